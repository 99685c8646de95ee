"""What of a checkpoint may be unpickled: scanned before Megatron-Core loads it.

`scan` finds the pickles in a checkpoint's files and says which globals each may hold; `pickle_scan` follows one opcode
by opcode and executes nothing. Why no library does this: docs/design.md. Saving and loading themselves are
`training/checkpoint.py`.
"""
