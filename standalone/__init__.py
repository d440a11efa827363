"""TreeRPO without ComfyUI: started from the repository's folder, `python -m standalone.launch`."""
