"""The theory of the expert bias as code that runs: `alflb theory`, and the certificates of `alflb train --certify`.

`problem` is the assignment problem of one batch with its dual; `solvers` solve it exactly, `descent` nearly and fast;
`curvature` says how strongly the dual curves, `iteration` is one step of the method as the paper writes it. Rules run
over a `score_stream`, and `growth_fit` reads from their regret how fast it grows. `claims` measure themselves with all
of these (`regret_streams` is what the regret is measured on); `command` runs them and hands what they found to `tables`
and `plots`. `certificate` says the same of a real layer's scores.
"""
