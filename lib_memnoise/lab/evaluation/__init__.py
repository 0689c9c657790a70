"""The paper's evaluation: which method, at which strength, for which loss of alignment.

A plan (`plan`) of prompts (`prompts`) and methods becomes images (by WebUIs or the miniature: `generators`, `dispatch`;
by Dask's workers: `cluster`) in a run's folder (`run`), which are measured (`metrics`), judged (`results`) and drawn
(`figures`, `report`); `workflow` does one after the other. Everything after the images is made again from the folder
alone.
"""
