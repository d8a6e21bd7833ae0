"""How many replicas, and why: the policy of the operator."""
