"""Several ranks that save as one: who they are, what they tell each other, and what they agree on. Without any collective.

world       who this process is among the ranks of its job
board       where ranks tell each other small things: the store of the process group
door        how ranks of one start find each other there
agreement   at which step all ranks save, where the step alone does not say so (pure)
fate        what becomes of one save: committed by all, or abandoned by all (pure)
roles       which ranks do what a few are enough for (pure)
roll        one rank decides, all learn it: when a job begins and when it restores
ownership   which rank writes what several ranks hold alike (pure)
team        all of these, for one Checkpointer
"""
