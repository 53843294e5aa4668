// Lists of tensors and what a kernel needs to know of each, by the fewest calls of the stable shim: a step asks for
// hundreds of tensors. std::vector<stable::Tensor> allocates a reference count for each, and the accessors of
// stable::Tensor take several calls for a dtype or a device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <utility>
#include <vector>

namespace sparse_cl {

struct TensorView {
  int32_t dtype, device_type, device_index;
  int64_t dim, numel;
  const int64_t* sizes;
  void* data;
  bool contiguous;

  explicit TensorView(const torch::stable::Tensor& t) : TensorView(t.get()) {}

  explicit TensorView(AtenTensorHandle h) {
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

// An argument Tensor[] of an op, made of the handle that the stable ABI passes.
class TensorList {
 public:
  TensorList(StableListHandle list) {
    size_t size = 0;
    bool failed = torch_list_size(list, &size);
    handles_.reserve(size);
    for (size_t i = 0; i < size && !failed; ++i) {
      StableIValue item;
      failed = torch_list_get_item(list, i, &item);
      if (!failed) handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(item));
    }
    failed |= torch_delete_list(list);
    STD_TORCH_CHECK(!failed, "could not read a list of tensors");
  }
  TensorList(TensorList&& other) noexcept : handles_(std::move(other.handles_)) { other.handles_.clear(); }
  TensorList& operator=(TensorList&&) = delete;
  ~TensorList() {
    for (AtenTensorHandle h : handles_) aoti_torch_delete_tensor_object(h);
  }

  size_t size() const { return handles_.size(); }
  bool empty() const { return handles_.empty(); }
  TensorView view(size_t i) const { return TensorView(handles_[i]); }
  torch::stable::Tensor tensor(size_t i) const {
    AtenTensorHandle copy;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handles_[i], &copy));
    return torch::stable::Tensor(copy);
  }

 private:
  std::vector<AtenTensorHandle> handles_;
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

template <typename T>
struct Passed {
  using type = T;
};
template <>
struct Passed<const TensorList&> {
  using type = StableListHandle;
};

// TORCH_BOX cannot unbox a TensorList: &FromHandles<&kernel>::call takes the handles of the lists instead.
template <auto kernel>
struct FromHandles;
template <typename Result, typename... Arguments, Result (*kernel)(Arguments...)>
struct FromHandles<kernel> {
  static Result call(typename Passed<Arguments>::type... arguments) {
    return kernel(std::forward<typename Passed<Arguments>::type>(arguments)...);
  }
};

}  // namespace sparse_cl
