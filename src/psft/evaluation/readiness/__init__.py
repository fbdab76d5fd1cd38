"""RL readiness, `psft eval MODEL... --suite rl-readiness`: which checkpoint to start reinforcement learning from.

`prompts` says what is asked, `psft.evaluation.session` samples and grades, `entropy` and `drift` ask the models here,
`measures` makes the numbers of one model; `fitness`, `compare` and `words` make a `verdict` of several; `session` does
it all in order.
"""
