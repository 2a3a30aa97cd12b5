"""Tracing, the ILP search and the plan: from a model to plan.json."""
