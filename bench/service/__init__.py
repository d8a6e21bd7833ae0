"""What the service itself costs: an engine that answers at once behind the real server, beside a real Triton."""
