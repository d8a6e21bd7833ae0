"""The parts of sampling: `adjust` (bias, bans, penalties), `mask` (grammars), `draw` (truncation and chance),
`logprobs`, and `reference`, the slow and obvious description of all of it for one row."""
