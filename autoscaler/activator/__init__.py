"""Holds requests while there is no replica, asks for the first, and hands them over.

client ─► grpc_proxy, http_proxy ─► Room: held, in order ─► hand-over, paced ─► replica
                                     │        ▲
                                wake │        │ serve(replicas), progress(text)
                                     ▼        │
                                    controller

While there are no replicas, the endpoints of their Service are the ports of `Activator`. It runs in the operator's
event loop: the first request wakes the controller at once, nothing is polled.
"""

from autoscaler.activator.activator import Activator, Addresses
from autoscaler.activator.hold import Room
from autoscaler.activator.replica import Replica
from autoscaler.activator.settings import ActivatorSettings, HoldLimits, TlsFiles

__all__ = ["Activator", "ActivatorSettings", "Addresses", "HoldLimits", "Replica", "Room", "TlsFiles"]
