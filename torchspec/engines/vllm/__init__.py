"""The vLLM backend: an engine, a generator, and the connector that vLLM itself loads. Nothing of vLLM is patched.

====================  ==========================================================================
``engine.py``         ``data.engine: vllm``
``remote.py``         ``data.engine: vllm_remote``
``connector.py``      runs inside vLLM: takes hidden states out of its cache into records
``cache.py``          how that cache is laid out, and reading a request out of it
``checks.py``         what a running vLLM must be like
``options.py``        engine arguments: what TorchSpec owns, what is passed through
``refusals.py``       what vLLM refuses, by the option's name
``answering.py``      workers that only answer, with the draft in training
``draft_weights.py``  new weights of that draft
``generator.py``      answers for ``regenerate``
====================  ==========================================================================
"""
