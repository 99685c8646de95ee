"""Pages about runs: `alflb report`.

`report` reads the runs (`records/history.py`), has `tables`, `figures` (runs share axes) and `layer_panels` (a panel a
layer) made of them, and `page` puts all into one HTML file that opens offline; `axes` is what the figures share.
"""
