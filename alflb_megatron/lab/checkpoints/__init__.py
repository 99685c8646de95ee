"""What of a checkpoint may be unpickled: looked through before Megatron-Core loads it.

`scan` finds the pickles in a checkpoint's files and says which names they may use; `pickle_scan` follows one opcode by
opcode and executes nothing. Saving and loading themselves are `training/checkpoint.py`.
"""
