"""The tree's shape, and its noise."""

from comfy_api.latest import io, ui

from ..core.method import cost
from ..core.method.noise import SHAPES, SIBLINGS, NoiseSchedule
from ..core.method.steps import KINDS
from ..core.method.tree import TreeShape
from ..core.method.windows import MODES
from ..core.pictures import plot
from ..core.pictures.theme import DARK
from .schema import NoiseSocket, ShapeSocket, expert, schema


class TreeShapeNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPOShape",
            "Tree Shape",
            description="How the trees branch, and at which sampling steps. Leaves per prompt = trees x "
            "branching^depth.",
            search_aliases=["grpo group size", "branching", "sde window"],
            inputs=[
                io.Int.Input(
                    "branching",
                    default=3,
                    min=1,
                    max=32,
                    tooltip="Children of every node inside the window. Higher = more images to compare, slower.",
                ),
                io.Int.Input(
                    "depth",
                    default=3,
                    min=1,
                    max=16,
                    tooltip="Tree layers, one per sampling step of the window. Higher = many more images "
                    "(branching^depth).",
                ),
                io.Int.Input(
                    "trees",
                    default=1,
                    min=1,
                    max=256,
                    tooltip="Independent trees per prompt, each from its own noise. Higher = more variety, slower.",
                ),
                io.Combo.Input(
                    "window",
                    options=list(MODES),
                    default="random",
                    tooltip="Which steps branch: random = early steps more often (TreeGRPO); sliding = moves through "
                    "the schedule (MixGRPO); fixed.",
                ),
                expert(
                    io.Float.Input(
                        "ratio",
                        default=0.5,
                        min=0.01,
                        max=1.0,
                        step=0.01,
                        optional=True,
                        tooltip="random: lower = earlier windows (composition), higher = later ones (detail). "
                        "TreeGRPO's best is 0.5.",
                    )
                ),
                expert(
                    io.Int.Input("stride", default=1, min=1, max=100, optional=True, tooltip="sliding: steps per move.")
                ),
                expert(
                    io.Int.Input(
                        "interval",
                        default=25,
                        min=1,
                        max=10000,
                        optional=True,
                        tooltip="sliding: iterations between moves.",
                    )
                ),
                expert(
                    io.Int.Input(
                        "first_step",
                        default=0,
                        min=0,
                        max=1000,
                        optional=True,
                        tooltip="fixed: the step the window starts at.",
                    )
                ),
                expert(
                    io.Combo.Input(
                        "sibling_noise",
                        options=list(SIBLINGS),
                        default="independent",
                        optional=True,
                        tooltip="Noise among the children of one node. antithetic and orthogonal spread them further "
                        "apart at no cost.",
                    )
                ),
                expert(
                    io.Float.Input(
                        "tail",
                        default=0.4,
                        min=0.05,
                        max=1.0,
                        step=0.05,
                        optional=True,
                        tooltip="Share of the steps after the window that are really taken. Lower = faster, slightly "
                        "rougher images. 1 = all.",
                    )
                ),
                expert(
                    io.Int.Input(
                        "steps",
                        default=10,
                        min=3,
                        max=1000,
                        optional=True,
                        tooltip="Only for the cost shown in the node: the number of sampling steps you train with.",
                    )
                ),
            ],
            outputs=[ShapeSocket.Output(display_name="shape"), io.String.Output(display_name="cost")],
        )

    @classmethod
    def execute(
        cls,
        branching,
        depth,
        trees,
        window,
        ratio=0.5,
        stride=1,
        interval=25,
        first_step=0,
        sibling_noise="independent",
        tail=0.4,
        steps=10,
    ) -> io.NodeOutput:
        shape = TreeShape(branching, depth, trees, window, ratio, stride, interval, first_step, sibling_noise, tail)
        text = cost.summary(shape, steps)
        return io.NodeOutput(shape, text, ui={"text": (text,)})


class DepthNoiseNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "TreeRPONoise",
            "Depth Noise Schedule",
            description="How much randomness each layer of the tree adds. More noise = siblings differ more and "
            "learning explores more; too much and the images fall apart.",
            search_aliases=["sde noise", "eta", "dynamic-treerpo"],
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=[kind for kind in KINDS if kind != "ode"],
                    default="cps",
                    tooltip="cps and exact keep the image as noisy as the model expects, at any level. flow_sde and "
                    "dance_sde are what most papers use; they leave some extra noise in late steps.",
                ),
                io.Float.Input(
                    "level",
                    default=0.7,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Higher = siblings differ more. Usual: 0.5 to 0.9; dance_sde 0.3. cps goes up to 1.",
                ),
                io.Combo.Input(
                    "shape",
                    options=list(SHAPES),
                    default="constant",
                    tooltip="How the level changes from the root to the leaves. linear with beta is Dynamic-TreeRPO's "
                    "equation 6; cosine and exponential are ours.",
                ),
                io.Float.Input(
                    "beta",
                    default=0.0,
                    min=-0.99,
                    max=10.0,
                    step=0.05,
                    tooltip="Strength of the change: above 0 = more noise in deeper layers, below 0 = less, 0 = the "
                    "same everywhere.",
                ),
                expert(
                    io.Combo.Input(
                        "count_layers_from",
                        options=["1", "0"],
                        default="1",
                        optional=True,
                        tooltip="Whether the first layer counts as 1 or 0 in the formula. The paper does not say; 1 "
                        "is our reading.",
                    )
                ),
                expert(
                    io.String.Input(
                        "list",
                        default="",
                        optional=True,
                        tooltip="For shape = list: one level per tree layer, such as 0.8, 0.7, 0.5",
                    )
                ),
                expert(
                    io.Float.Input(
                        "first_step_correlation",
                        default=0.7,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        optional=True,
                        tooltip="exact only, and only where the window starts at the very first step: how much of the "
                        "root's noise the children keep. 0 = none, they become unrelated; higher = they stay closer.",
                    )
                ),
                expert(
                    io.Int.Input(
                        "depth",
                        default=3,
                        min=1,
                        max=16,
                        optional=True,
                        tooltip="Only for the picture in the node: the depth of your Tree Shape.",
                    )
                ),
            ],
            outputs=[NoiseSocket.Output(display_name="noise"), io.Image.Output(display_name="picture")],
        )

    @classmethod
    def execute(
        cls, kind, level, shape, beta, count_layers_from="1", list="", first_step_correlation=0.7, depth=3
    ) -> io.NodeOutput:
        try:
            values = [float(part) for part in list.replace(";", ",").split(",") if part.strip()]
        except ValueError:
            raise ValueError(f"The noise list '{list}' is not a list of numbers: write it as 0.8, 0.7, 0.5.") from None
        schedule = NoiseSchedule(kind, level, shape, beta, int(count_layers_from), values, first_step_correlation)
        # refuses impossible settings here, where the user set them
        levels = schedule.levels(len(values) if shape == "list" else depth)
        image = plot.to_tensor(plot.noise_picture(levels, kind, theme=DARK))
        return io.NodeOutput(schedule, image, ui=ui.PreviewImage(image, cls=cls))
