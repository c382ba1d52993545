"""The SGLang backend: hooks that SGLang itself registers on the target's modules, in its scheduler process. Nothing of SGLang is patched.

================  ===================================================================================
``engine.py``     ``data.engine: sglang``
``remote.py``     ``data.engine: sglang_remote``
``generator.py``  answers for ``regenerate``
``options.py``    engine arguments: what TorchSpec owns, what is passed through
``launch.py``     SGLang's processes as children of a worker
``stand_ins.py``  packages that SGLang imports on a CPU and does not use there
``hooks.py``      runs inside SGLang: what SGLang calls with each module's output
``collector.py``  rows of hidden states, over chunks of a prefill, into whole records
``families.py``   which targets were seen to give right states, and where their modules are
================  ===================================================================================
"""
