"""PathGuard: adversarial defence inside the forward pass that answers.

Serving half: `defense.guard`, `defense.gate`, `defense.artifact` and what they import. Offline half:
`defense.offline`. Command line: `defense.cli`. Server adapters: the package `handlers`.
"""
