"""Kubernetes, as far as the operator needs it."""
