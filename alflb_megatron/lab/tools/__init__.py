"""Commands about an installation or a model that train nothing: `alflb bias`, `alflb doctor`, `alflb patch`."""
