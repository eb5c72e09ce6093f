"""The CPU tier: memory of both tiers, copies between them, and what they cost."""
