"""RULER's 13 tasks, generated as NVIDIA/RULER defines them: templates, haystacks, token budgets, answers.

`tasks.TASKS` holds them all and `tasks.draw` makes one sample; each task has a file of its own with a pure `build`.
"""
