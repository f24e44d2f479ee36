"""The paired engine. Pair logic is here; only :mod:`osd.engine.backend` touches vLLM's internals.

Two of vLLM's plug points turn an ordinary engine into a pair. ``worker_cls`` (:mod:`osd.engine.backend.worker`) holds two model
runners, ``scheduler_cls`` (:mod:`osd.engine.backend.scheduler`) two schedulers. The rest of OSD uses
:class:`osd.engine.engine.PairEngine`.
"""
