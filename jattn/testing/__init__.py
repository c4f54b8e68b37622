"""The conformance suite and the tolerance policy, importable, so that users can check mechanisms of their own."""
