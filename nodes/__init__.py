"""TreeRPO's nodes, one file per stage of the graph, in the order an artist wires them."""
from .policy import PolicyNode, Prompts, TinyModel
from .reward import CombineRewards, ImageMeasure, ScoreImages
from .sample import TreeSampler
from .save import PolicyToLora, SaveTreeLora
from .shape import DepthNoise, Shape
from .train import Advantages, GRPOUpdate, LayerTuningUpdate

NODES = [TinyModel, Prompts, PolicyNode, Shape, DepthNoise, TreeSampler, ImageMeasure, CombineRewards, ScoreImages, Advantages, GRPOUpdate,
         LayerTuningUpdate, PolicyToLora, SaveTreeLora]
