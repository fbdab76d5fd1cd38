"""Which sequences share one old policy, in what order they are trained, and what that policy gave them."""

from psft.window.controller import TrustRegionController
from psft.window.schedule import EpochPlan, Schedule, Step, plan_epoch
from psft.window.window import Window

__all__ = ["EpochPlan", "Schedule", "Step", "TrustRegionController", "Window", "plan_epoch"]
