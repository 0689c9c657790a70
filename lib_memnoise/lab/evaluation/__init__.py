"""The paper's evaluation: which method, at which strength, for which loss of alignment.

A plan (`plan`) of prompts (`prompts`) and methods becomes images (`dispatch`, to WebUIs or the miniature: `generators`,
or to other machines: `cluster`) in a run's folder (`run`), which are measured (`metrics`), put into tables (`results`,
`trajectories`), judged (`claims`) and drawn (`figures`, `report`); `workflow` does all of it in turn. What comes after
the images is made again from the folder alone.
"""
