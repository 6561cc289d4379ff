"""What the network, its training and the attacks cost, beside what they are compared with.

One concept a file: `timing` (who is timed against whom), `result` (what is kept), `scale` (how much), `networks`,
`attacks`, `suites` and `scaling` (what is run), `peers` (other libraries), `memory`, `machine`, `document` (the page),
`running` (all together).
Nothing here imports torch before it is needed.
"""

SECTIONS = ("model", "attacks", "suite", "scaling")
"""Parts of the benchmark, in the order in which they run."""
