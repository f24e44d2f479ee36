"""The only files that touch vLLM's internals: scheduler, worker, sampler and version gate."""
