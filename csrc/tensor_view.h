// What a kernel needs to know of a tensor, each read once through the stable shim: a step asks for hundreds of tensors,
// and stable::Tensor's own accessors take several calls for a dtype or a device.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace sparse_cl {

struct TensorView {
  int32_t dtype, device_type, device_index;
  int64_t dim, numel;
  const int64_t* sizes;
  void* data;
  bool contiguous;

  explicit TensorView(const torch::stable::Tensor& t) {
    const AtenTensorHandle h = t.get();
    int64_t* shape;
    const bool failed = aoti_torch_get_dtype(h, &dtype) | aoti_torch_get_device_type(h, &device_type) |
                        aoti_torch_get_device_index(h, &device_index) | aoti_torch_get_dim(h, &dim) |
                        aoti_torch_get_numel(h, &numel) | aoti_torch_get_sizes(h, &shape) |
                        aoti_torch_is_contiguous(h, &contiguous) | aoti_torch_get_data_ptr(h, &data);
    STD_TORCH_CHECK(!failed, "expected dense tensors with storage");
    sizes = shape;
  }

  bool same_place(const TensorView& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }
  bool same_shape(const TensorView& other) const {
    if (dim != other.dim) return false;
    for (int64_t d = 0; d < dim; ++d)
      if (sizes[d] != other.sizes[d]) return false;
    return true;
  }
};

// Codes of the dtypes in TensorView::dtype.
struct DTypeCodes {
  const int32_t float64 = aoti_torch_dtype_float64(), float32 = aoti_torch_dtype_float32(),
                bfloat16 = aoti_torch_dtype_bfloat16(), float16 = aoti_torch_dtype_float16(),
                uint8 = aoti_torch_dtype_uint8(), int64 = aoti_torch_dtype_int64();
};

inline const DTypeCodes& dtype_codes() {
  static const DTypeCodes codes;
  return codes;
}

}  // namespace sparse_cl
