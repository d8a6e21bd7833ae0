"""Which requests are accepted, in which order they reach the engine, and when they are cut off."""

from service.admission.delivery import Delivery
from service.admission.flight import Flight
from service.admission.gate import Admission
from service.admission.limits import QueueLimits
from service.admission.stats import AdmissionStats, Refusal

__all__ = ["Admission", "AdmissionStats", "Delivery", "Flight", "QueueLimits", "Refusal"]
