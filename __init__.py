"""TreeRPO: online RL fine-tuning of FLUX and SD3 inside ComfyUI, with tree-structured sampling."""

if __package__:  # loaded by ComfyUI; pytest also imports this file, by path and without a package
    from comfy_api.latest import ComfyExtension

    from .nodes import NODES

    WEB_DIRECTORY = "web"  # help pages

    class TreeRPO(ComfyExtension):
        async def get_node_list(self):
            return NODES

    async def comfy_entrypoint():
        return TreeRPO()
