"""Commands about an installation or a model that train nothing: `alflb bias`, `alflb doctor`, `alflb patch`.

Each is one module with its flags; `bias` also reads what `alflb train --bias` starts from.
"""
