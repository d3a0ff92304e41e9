"""RULER tasks, generated as NVIDIA/RULER defines them: templates, needle placement, token budgets, metrics."""
