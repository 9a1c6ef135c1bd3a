// One look at the tensors of a step: whether all are as they were, and where their memory is now.
//
// Python takes about a microsecond for each parameter (its gradient, sizes and strides, address, version counter), most
// of it waiting for memory; this takes a tenth. Built against those headers in torch's wheel that compile in two
// seconds; the one that knows Python's tensor objects takes fifteen, so where the tensor is in its object is found out
// (`place_in`). Called with the interpreter's lock held. No function lets an exception out.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

extern "C" {  // Python.h is not on every machine that has a compiler
PyObject* PyList_GetItem(PyObject*, intptr_t);
PyObject* PyObject_Type(PyObject*);
void Py_DecRef(PyObject*);
}

namespace {

struct Known {
  PyObject* type;             // of the object
  int64_t owner;              // which tensor it is the gradient of, or -1
  c10::DispatchKeySet keys;   // the kind of memory, and whether it holds the values or their negatives
  caffe2::TypeMeta dtype;
  c10::Device device;
  std::vector<int64_t> sizes, strides;

  Known(const at::Tensor& t, PyObject* type_, int64_t owner_)
      : type(type_),
        owner(owner_),
        keys(t.key_set()),
        dtype(t.dtype()),
        device(t.device()),
        sizes(t.sizes().vec()),
        strides(t.strides().vec()) {}

  // Elements are contiguous here; a storage may have been given back (resize_(0)) under a tensor that stays.
  bool fits(const at::Tensor& t) const {
    return t.key_set() == keys && t.dtype() == dtype && t.device() == device && t.sizes().equals(sizes) &&
        t.strides().equals(strides) && t.has_storage() &&
        t.storage().nbytes() >= (t.storage_offset() + t.numel()) * t.itemsize();
  }
};

struct Table {
  int64_t place;                    // of the tensor in its object, in bytes
  std::vector<PyObject*> objects;   // those learned
  std::vector<Known> known;
  std::vector<int64_t> order;       // of looking: those that are no gradients come first
  std::vector<c10::TensorImpl*> now;  // of the last look
  std::vector<at::Tensor> held;     // gradients: another thread may set p.grad while a kernel runs

  const at::Tensor& in(PyObject* object) const {
    return *reinterpret_cast<at::Tensor*>(reinterpret_cast<char*>(object) + place);
  }

  // Tensor i of this step, if `now` has its owner; torch's undefined tensor where there is no gradient.
  const at::Tensor& present(int64_t i) const {
    return known[i].owner < 0 ? in(objects[i]) : now[known[i].owner]->grad();
  }

  // Asks for the memory of tensors whose turn comes soon: most of a look is waiting for it.
  void fetch_behind(size_t turn) const {
    const size_t near = turn + 4, far = turn + 8;
    if (far >= order.size() || (known[order[turn]].owner < 0 && known[order[far]].owner >= 0)) return;
    const auto* impl = reinterpret_cast<const char*>(present(order[far]).unsafeGetTensorImpl());
    for (size_t at = 0; at < sizeof(c10::TensorImpl); at += 64) __builtin_prefetch(impl + at);
    const at::Tensor& t = present(order[near]);
    if (t.has_storage()) __builtin_prefetch(t.storage().unsafeGetStorageImpl());
  }
};

// Where an object of `size` bytes holds this tensor, or -1.
int64_t place_in(PyObject* object, int64_t size, const at::Tensor& t) {
  const void* wanted = t.unsafeGetTensorImpl();
  for (int64_t at = 0; at + static_cast<int64_t>(sizeof(wanted)) <= size; at += sizeof(wanted)) {
    if (std::memcmp(reinterpret_cast<char*>(object) + at, &wanted, sizeof(wanted)) == 0) return at;
  }
  return -1;
}

PyObject* type_of(PyObject* object) {
  PyObject* type = PyObject_Type(object);
  Py_DecRef(type);  // the object keeps it
  return type;
}

}  // namespace

extern "C" {

// Takes the tensors over, which are those of the objects. size: bytes of a tensor object. owners[i]: which tensor i is
// the gradient of, or -1. Null: they cannot be looked at so.
void* look_make(at::Tensor* const* tensors, PyObject* const* objects, const int64_t* owners, int64_t n, int64_t size) {
  auto table = std::make_unique<Table>();
  bool good = n > 0;
  try {
    table->place = good ? place_in(objects[0], size, *tensors[0]) : -1;
    good = table->place >= 0;
    table->now.resize(n);
    for (int64_t i = 0; good && i < n; i++) {
      const at::Tensor& t = *tensors[i];
      table->known.emplace_back(t, type_of(objects[i]), owners[i]);
      table->objects.push_back(objects[i]);
      if (owners[i] < 0) table->order.push_back(i);
      good = table->in(objects[i]).is_same(t) && t.is_contiguous() && table->known[i].fits(t) &&
          (owners[i] < 0 || tensors[owners[i]]->unsafeGetTensorImpl()->grad().is_same(t));
    }
    for (int64_t i = 0; i < n; i++) {
      if (owners[i] >= 0) table->order.push_back(i);
    }
  } catch (...) {
    good = false;
  }
  for (int64_t i = 0; i < n; i++) delete tensors[i];
  return good ? table.release() : nullptr;
}

void look_free(void* table) {
  delete static_cast<Table*>(table);
}

// Lets go of gradients; tells autograd which tensors were written since the last look (null: none).
void look_done(void* table_, const uint8_t* written) {
  auto& table = *static_cast<Table*>(table_);
  for (size_t i = 0; i < table.now.size(); i++) {
    if (written != nullptr && written[i] && !table.now[i]->is_inference()) table.now[i]->bump_version();
  }
  table.held.clear();
}

// Whether tensors are as those learned; writes their addresses. look_done has to follow. given: a list of them; null:
// those of the objects learned, which must exist, and their present gradients.
int look_same(void* table_, PyObject* given, int64_t* addresses) {
  auto& table = *static_cast<Table*>(table_);
  bool same = true;
  try {
    for (size_t turn = 0; turn < table.order.size(); turn++) {
      const int64_t i = table.order[turn];
      const Known& k = table.known[i];
      PyObject* object = given != nullptr ? PyList_GetItem(given, i) : nullptr;
      if (object == nullptr) table.fetch_behind(turn);
      if (object != nullptr && type_of(object) != k.type) {
        same = false;
        break;
      }
      const at::Tensor& t = object != nullptr ? table.in(object) : table.present(i);
      same = t.defined() && k.fits(t);
      if (!same) break;
      addresses[i] = reinterpret_cast<int64_t>(t.mutable_data_ptr());
      table.now[i] = t.unsafeGetTensorImpl();
      if (object == nullptr && k.owner >= 0) table.held.push_back(t);
    }
  } catch (...) {
    same = false;
  }
  if (!same) look_done(table_, nullptr);
  return same;
}

}  // extern "C"
