"""GenEval (arXiv 2310.11513): prompts, judging rules and a judge on this stack."""
