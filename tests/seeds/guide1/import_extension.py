import intel_extension_for_pytorch as ipex

print(ipex.__name__)
