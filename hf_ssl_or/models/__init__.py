"""Encoders for transformers; importing this makes the Auto classes and the pipelines know them."""

from __future__ import annotations

from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.pipelines import PIPELINE_REGISTRY

from hf_ssl_or.models.configuration_ssl import SSLResNetConfig, SSLTimmConfig, SSLViTConfig
from hf_ssl_or.models.image_processing_ssl import SSLImageProcessor
from hf_ssl_or.models.modeling_ssl_resnet import SSLResNetBackbone, SSLResNetForImageClassification, SSLResNetModel
from hf_ssl_or.models.modeling_ssl_timm import SSLTimmBackbone, SSLTimmForImageClassification, SSLTimmModel
from hf_ssl_or.models.modeling_ssl_vit import SSLViTBackbone, SSLViTForImageClassification, SSLViTModel

for _config, _model, _classifier, _backbone in (
    (SSLResNetConfig, SSLResNetModel, SSLResNetForImageClassification, SSLResNetBackbone),
    (SSLViTConfig, SSLViTModel, SSLViTForImageClassification, SSLViTBackbone),
    (SSLTimmConfig, SSLTimmModel, SSLTimmForImageClassification, SSLTimmBackbone),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForImageClassification.register(_config, _classifier)
    AutoBackbone.register(_config, _backbone)
    AutoImageProcessor.register(_config, image_processor_classes={"torchvision": SSLImageProcessor})

for _task, _pipeline in (
    ("image-feature-extraction", "SSLImageFeatureExtractionPipeline"),
    ("image-classification", "SSLImageClassificationPipeline"),
):
    PIPELINE_REGISTRY.supported_tasks[_task]["impl"] = f"{__name__}.pipeline_ssl.{_pipeline}"
