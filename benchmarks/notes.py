"""What the pages of all studies say of their numbers; each adds what is its own."""

INTERVALS = "95 % intervals: BCa bootstrap over whole prompts, stratified by task"
VALUES = f"Values are percent with {INTERVALS}; overall is the unweighted mean of the tasks"
PAIRED = "Differences are paired image by image on the same initial latents"
COUNTED = "NFE is counted on the denoiser"

NOTES = f"{VALUES}. {PAIRED}; distances are |x - y| / |y| of the final latents. {COUNTED}."
"""Of a study that adds nothing."""
