"""What the process that leads does, again and again, for each QueueAutoscaler.

    controller ─► one tender per resource ─► reconciler: see ─► policy ─► verdict ─► plan ─► act ─► tell

`spare`, `victims`, `verdict` and the plan of `drain` are pure; the rest acts through `autoscaler.cluster` alone.
"""
