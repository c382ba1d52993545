"""The vLLM backend: an engine, a generator, and the connector that vLLM itself loads. Nothing of vLLM is patched.

====================  ==========================================================================
``options.py``        engine arguments: what TorchSpec owns, what is passed through, versions
``connector.py``      runs inside vLLM: takes hidden states out of its cache into records
``cache.py``          how that cache is laid out, and reading a request out of it
``sink.py``           records on their way from the connector to the store, and word of them back
``capture_requests.py``  what a request asks of the connector, and the connector's report
``capture.py``        leases to requests, reports to results; base of the two engines
``reports.py``        the engine's end of the connectors' reports
``engine.py``         ``data.engine: vllm``
``remote.py``         ``data.engine: vllm_remote``
``generator.py``      answers for ``regenerate``
====================  ==========================================================================
"""
