"""TreeRPO's nodes, one file per stage of the graph, in the order an artist wires them."""

from .preflight import PreflightNode
from .pick import HumanRewardNode, PickWinnerNode
from .ocr import OcrNode
from .geneval import GenEvalNode
from .policy import PolicyNode, TinyModelNode
from .prompts import PromptListNode, PromptsNode
from .reward import CombineRewardsNode, ImageFolderNode, ScoreImagesNode
from .reward_models import (
    AestheticNode,
    ClipScoreNode,
    HpsNode,
    HpsV3Node,
    ImageMeasureNode,
    ImageRewardNode,
    ImageSimilarityNode,
    PickScoreNode,
    TinyJudgeNode,
    TinyRewardNode,
)
from .sample import TreeSamplerNode
from .server_reward import ServerRewardNode
from .save import PolicyToLoraNode, SaveTreeLoraNode
from .shape import DepthNoiseNode, TreeShapeNode
from .advantages import AdvantagesNode
from .objective import ObjectiveNode
from .update import LayerTuningNode, RegressionNode, UpdateNode
from .trainer import TrainerNode
from .simple import SimpleTrainerNode
from .teach import MyTasteNode, TeachNode
from .tree_view import TreeViewNode
from . import go_back as go_back  # its route

NODES = [
    TinyModelNode,
    PromptsNode,
    PolicyNode,
    TreeShapeNode,
    DepthNoiseNode,
    TreeSamplerNode,
    ImageRewardNode,
    HpsNode,
    HpsV3Node,
    PickScoreNode,
    ClipScoreNode,
    AestheticNode,
    OcrNode,
    GenEvalNode,
    ImageSimilarityNode,
    ImageMeasureNode,
    ServerRewardNode,
    TinyRewardNode,
    TinyJudgeNode,
    CombineRewardsNode,
    ImageFolderNode,
    ScoreImagesNode,
    AdvantagesNode,
    UpdateNode,
    LayerTuningNode,
    RegressionNode,
    PromptListNode,
    ObjectiveNode,
    PreflightNode,
    TrainerNode,
    SimpleTrainerNode,
    TeachNode,
    MyTasteNode,
    PolicyToLoraNode,
    SaveTreeLoraNode,
    TreeViewNode,
    HumanRewardNode,
    PickWinnerNode,
]
