"""What one does around the plug-in: train, prepare data, replay, test the theory, report, sweep. Needs `[lab]`.

The plug-in, which a training job imports, is everything outside this folder and imports nothing of it. `cli.py` is the
front: one thin line a command. A room imports only those above it:

    records       a run's folder: what is written in it, and how it is read back
    checkpoints   what of a checkpoint may be unpickled
    data          text to tokens, and tokens to micro-batches
    display       axes, colours and tables that several rooms draw with
    theory        the assignment problem, its dual, exact solvers and the claims
    replay        rules over recorded router scores
    report        pages about runs that are over
    watch         a run that goes on, in the terminal
    tools         `alflb bias`, `alflb doctor`, `alflb patch`
    training      one training job on real Megatron-Core
    sweep         many training jobs, compared
"""
