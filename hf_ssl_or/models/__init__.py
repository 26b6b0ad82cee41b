"""Encoders for transformers; importing this makes the Auto classes know them."""

from __future__ import annotations

from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from hf_ssl_or.models.configuration_ssl import SSLResNetConfig, SSLViTConfig
from hf_ssl_or.models.image_processing_ssl import SSLImageProcessor
from hf_ssl_or.models.modeling_ssl_resnet import SSLResNetBackbone, SSLResNetForImageClassification, SSLResNetModel
from hf_ssl_or.models.modeling_ssl_vit import SSLViTBackbone, SSLViTForImageClassification, SSLViTModel

for _config, _model, _classifier, _backbone in (
    (SSLResNetConfig, SSLResNetModel, SSLResNetForImageClassification, SSLResNetBackbone),
    (SSLViTConfig, SSLViTModel, SSLViTForImageClassification, SSLViTBackbone),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForImageClassification.register(_config, _classifier)
    AutoBackbone.register(_config, _backbone)
    AutoImageProcessor.register(_config, image_processor_classes={"torchvision": SSLImageProcessor})
