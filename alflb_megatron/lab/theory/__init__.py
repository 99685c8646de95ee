"""The theory of the expert bias as code that runs: the problem, its dual, exact solvers, curvature and the claims."""
