"""Callbacks: where a feature meets a measurement. They attach to the Trainer and stay thin."""

from callbacks.control import Control
from callbacks.graceful_stop import GracefulStop
from callbacks.gradient_guard import GradientGuard
from callbacks.inference_timing import InferenceTiming
from callbacks.ladder import Ladder
from callbacks.log_config import LogConfig
from callbacks.model_card import HFExport
from callbacks.other_text import OtherText
from callbacks.prefill_memory import PrefillMemory
from callbacks.prefill_timing import PrefillTiming
from callbacks.progress import Progress
from callbacks.quantization_timing import QuantizationTiming
from callbacks.run_folders import RunFolders
from callbacks.run_log import RunLog
from callbacks.run_record import RunRecord
from callbacks.throughput import Throughput
from callbacks.tier_schedule import TierSchedule
from callbacks.time_to_quality import TimeToQuality
from callbacks.trace import Trace
from callbacks.traffic_monitor import TrafficMonitor

__all__ = [
    "Control",
    "GracefulStop",
    "GradientGuard",
    "HFExport",
    "InferenceTiming",
    "Ladder",
    "LogConfig",
    "OtherText",
    "PrefillMemory",
    "PrefillTiming",
    "Progress",
    "QuantizationTiming",
    "RunFolders",
    "RunLog",
    "RunRecord",
    "Throughput",
    "TierSchedule",
    "TimeToQuality",
    "Trace",
    "TrafficMonitor",
]
