"""TCL for Hugging Face: vision-language pre-training with triple contrastive learning (CVPR 2022).

Importing this package registers TCL with transformers' Auto classes and pipelines.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
)

from .inference.pipelines import register_pipelines
from .models.configuration_tcl import TCLConfig, TCLTextConfig, TCLVisionConfig
from .models.encoders import TCLPreTrainedModel, TCLTextModel, TCLVisionModel
from .models.image_processing_tcl import TCLImageProcessor, TCLImageProcessorPil
from .models.modeling_tcl import (
    TCLForImageTextRetrieval,
    TCLForMaskedLM,
    TCLForPreTraining,
    TCLModel,
)
from .models.modeling_tcl_tasks import (
    TCLForQuestionAnswering,
    TCLForTextAssignment,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
)
from .models.processing_tcl import TCLProcessor
from .models.tokenization_tcl import TCLTokenizer

__version__ = "0.1.0"

for _config, _model in ((TCLConfig, TCLModel), (TCLVisionConfig, TCLVisionModel), (TCLTextConfig, TCLTextModel)):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
AutoModelForPreTraining.register(TCLConfig, TCLForPreTraining)
AutoModelForMaskedLM.register(TCLConfig, TCLForMaskedLM)
AutoModelForVisualQuestionAnswering.register(TCLConfig, TCLForQuestionAnswering)
AutoModelForZeroShotImageClassification.register(TCLConfig, TCLModel)
AutoTokenizer.register(TCLConfig, fast_tokenizer_class=TCLTokenizer)
AutoImageProcessor.register(
    TCLConfig, image_processor_classes={"torchvision": TCLImageProcessor, "pil": TCLImageProcessorPil}
)
AutoProcessor.register(TCLConfig, TCLProcessor)
register_pipelines()

__all__ = [
    "TCLConfig",
    "TCLForImageTextRetrieval",
    "TCLForMaskedLM",
    "TCLForPreTraining",
    "TCLForQuestionAnswering",
    "TCLForTextAssignment",
    "TCLForVisualEntailment",
    "TCLForVisualReasoning",
    "TCLImageProcessor",
    "TCLImageProcessorPil",
    "TCLModel",
    "TCLPreTrainedModel",
    "TCLProcessor",
    "TCLTextConfig",
    "TCLTextModel",
    "TCLTokenizer",
    "TCLVisionConfig",
    "TCLVisionModel",
]
