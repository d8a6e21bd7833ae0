"""The operator: as many replicas of a workload as its queue needs. Imports neither torch nor engine nor service.

fleet ──► policy ──► decision          pure: what was seen goes in, how many replicas and why comes out
  ▲                     │
observe              controller        GetLoad of every replica in; /scale, drain marks, Events and status out
                        │
activator ──────────────┘              holds requests while there is no replica, and asks for the first
simulate                               replays traces against any policy, ours and those of others
"""
