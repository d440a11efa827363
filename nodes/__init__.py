"""TreeRPO's nodes, one file per stage of the graph, in the order an artist wires them."""
from .look import Preflight
from .pick import HumanRewardNode, PickWinner
from .policy import PolicyNode, Prompts, TinyModel
from .reward import CombineRewards, ImageFolder, ScoreImages
from .reward_models import (AestheticLoader, ClipScoreLoader, HpsLoader, ImageMeasure, ImageRewardLoader, ImageSimilarity, PickScoreLoader,
                            ServerRewardNode)
from .sample import TreeSampler
from .save import PolicyToLora, SaveTreeLora
from .shape import DepthNoise, Shape
from .train import Advantages, GRPOUpdate, LayerTuningUpdate
from .trainer import ObjectiveNode, PromptListNode, TrainerNode
from .tree_view import TreeView

NODES = [TinyModel, Prompts, PolicyNode, Shape, DepthNoise, TreeSampler,
         ImageRewardLoader, HpsLoader, PickScoreLoader, ClipScoreLoader, AestheticLoader, ImageSimilarity, ImageMeasure, ServerRewardNode,
         CombineRewards, ImageFolder, ScoreImages, Advantages, GRPOUpdate, LayerTuningUpdate,
         PromptListNode, ObjectiveNode, Preflight, TrainerNode, PolicyToLora, SaveTreeLora,
         TreeView,
         HumanRewardNode, PickWinner]
