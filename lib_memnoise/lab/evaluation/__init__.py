"""The paper's evaluation: which method, at which strength, for which loss of alignment.

A plan (`plan`) of prompts (`prompts`) and methods becomes images (`making`, by a WebUI or the miniature: `makers`, or
by many of them: `cluster`) in a run's folder (`run`), which are measured (`metrics`), judged (`results`) and drawn
(`figures`, `report`). Everything after the images is made again from the folder alone.
"""
