"""The paired engine: everything that touches vLLM's internals, and nothing else in OSD does.

Two of vLLM's plug points turn an ordinary engine into a pair: ``worker_cls`` (:mod:`osd.engine.worker`) holds two
model runners, ``scheduler_cls`` (:mod:`osd.engine.scheduler`) two schedulers. :class:`osd.engine.engine.PairEngine` is the
front end that the rest of OSD uses.
"""
