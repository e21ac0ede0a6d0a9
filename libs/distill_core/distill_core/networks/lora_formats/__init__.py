"""LoRA files of other programs: the keys of diffusers, kohya's scripts, peft and ComfyUI, read and written."""
