"""CUDA graphs: the launches of a run are recorded once and replayed as one, so that a step costs no Python."""

from glowplug.cuda_graphs.graphs import CudaGraphs
from glowplug.cuda_graphs.memory import Reads
from glowplug.cuda_graphs.recorder import Recorder, Recording, recorder_for
from glowplug.cuda_graphs.steps import Step

__all__ = ["CudaGraphs", "Reads", "Recorder", "Recording", "Step", "recorder_for"]
