"""Capturing in an engine that runs elsewhere: its library has processes of its own (vLLM, SGLang), and records are written where the states are.

===============  ===================================================================================
``engine.py``    the worker's side: leases become requests, reports become results
``requests.py``  what a request asks of the side that writes, signed, and what that side reports
``reports.py``   the worker's end of the reports
``server.py``    the way to a server that somebody else started
``sink.py``      the side that writes: states on their way to the store, and the reports on each record
===============  ===================================================================================
"""
