// One check of the tensors of a step: whether all are as they were, and where their memory is now.
//
// Python takes about a microsecond for each parameter (its gradient, sizes and strides, address, version counter), most
// of it waiting for memory; this takes a tenth. It is built against the header in torch's wheel that compiles in two
// seconds; the one with all of a tensor's methods takes one more, and the one that knows Python's tensor objects
// fifteen, so where the tensor is in its object is found out (`place_in`). It is called with the interpreter's lock
// held. No function lets an exception out.

#include <ATen/core/TensorBase.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

extern "C" {  // Python.h is not on every machine that has a compiler
PyObject* PyList_GetItem(PyObject*, intptr_t);
PyObject* PyObject_Type(PyObject*);
int PyDict_Next(PyObject*, intptr_t*, PyObject**, PyObject**);
void Py_DecRef(PyObject*);
}

namespace {

// One more owner of a tensor.
at::TensorBase held(c10::TensorImpl* t) {
  return at::TensorBase(c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::reclaim_copy(t));
}

// An at::Tensor, which that header does not define, is a TensorBase with methods.
const at::TensorBase& gradient(const c10::TensorImpl* t) {
  return reinterpret_cast<const at::TensorBase&>(t->grad());
}

struct Kind {
  PyObject* type;            // of the object
  c10::DispatchKeySet keys;  // the kind of memory, and whether it holds the values or their negatives
  caffe2::TypeMeta dtype;
  c10::Device device;
  std::vector<int64_t> sizes, strides;
  size_t item;  // bytes of an element, and of all of them
  size_t bytes;

  Kind(PyObject* type, const at::TensorBase& t)
      : type(type), keys(t.key_set()), dtype(t.dtype()), device(t.device()), sizes(t.sizes().vec()), strides(t.strides().vec()),
        item(t.itemsize()), bytes(t.nbytes()) {}

  // Where the elements of a tensor of this kind are, and null is where those of an empty one are; false for others.
  // Elements are contiguous here; a storage may have been given back (resize_(0)) under a tensor that stays.
  bool find(const c10::TensorImpl* t, void*& at) const {
    if (t->key_set() != keys || t->dtype() != dtype || t->device() != device || !t->sizes().equals(sizes) ||
        !t->strides().equals(strides)) {
      return false;
    }
    c10::StorageImpl* storage = t->unsafe_storage().unsafeGetStorageImpl();  // has_storage() of this kind, uncalled
    const size_t before = t->storage_offset() * item;
    if (storage == nullptr || storage->nbytes() < before + bytes) return false;
    char* memory = static_cast<char*>(storage->mutable_data());
    at = bytes == 0 ? nullptr : memory + before;
    return true;
  }
};

struct Known {  // a word, because all of them are read at every check
  int32_t kind;   // among those of the table: most tensors of a step are of few kinds
  int32_t owner;  // which tensor it is the gradient of, or -1
};

struct Table {
  int64_t place, type_place;          // of the tensor and of its type in its object, in bytes
  std::vector<Kind> kinds;
  std::vector<PyObject*> objects;     // those learned
  std::vector<Known> known;
  std::vector<int64_t> order;         // of looking: those that are no gradients come first
  int64_t gradients;                  // the turn of the first one
  std::vector<c10::TensorImpl*> now;  // of the last check
  int64_t alone;                      // the first turn of a gradient that it looked up through its tensor
  std::vector<at::TensorBase> held;   // gradients: another thread may set p.grad while a kernel runs

  const at::TensorBase& in(PyObject* object) const {
    return *reinterpret_cast<at::TensorBase*>(reinterpret_cast<char*>(object) + place);
  }

  PyObject* type_of(PyObject* object) const {
    return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + type_place);
  }

  int32_t kind_of(PyObject* type, const at::TensorBase& t) {
    void* at;
    const auto same = [&](const Kind& k) { return k.type == type && k.find(t.unsafeGetTensorImpl(), at); };
    const auto found = std::find_if(kinds.begin(), kinds.end(), same) - kinds.begin();
    if (found == static_cast<int64_t>(kinds.size())) kinds.emplace_back(type, t);
    return found;
  }
};

// Shares turns among threads, in the same way at every call: what one of them has read is in its core's cache, and takes
// another core as long as memory does. Is true if all parts are; they touch no Python objects but to read them, which the
// caller's lock allows.
template <typename Part>
bool share(int64_t first, int64_t last, int64_t threads, Part part) {
  constexpr int64_t WORTH = 256;  // turns that are worth another thread
  const int64_t parts = std::max<int64_t>(1, std::min(threads, (last - first) / WORTH));
  bool good = true;
  #pragma omp parallel for num_threads(parts) if (parts > 1) schedule(static) reduction(&& : good)
  for (int64_t k = 0; k < parts; k++) {
    try {
      good = part(first + (last - first) * k / parts, first + (last - first) * (k + 1) / parts) && good;
    } catch (...) {
      good = false;
    }
  }
  return good;
}

// One check. Most of it is waiting for memory, so every tensor is taken up in stages, each of them some turns ahead of
// the next, that ask for the memory which the next one needs.
struct Check {
  static constexpr int64_t AHEAD = 6;
  Table& table;
  const std::vector<PyObject*>& objects;
  int64_t* addresses;

  // The tensor of a turn, or null if its object is of another type; torch's undefined tensor where there is none.
  const at::TensorBase* tensor(int64_t turn) const {
    const int64_t i = table.order[turn];
    if (turn >= table.alone) return &gradient(table.now[table.known[i].owner]);
    return table.type_of(objects[i]) == table.kinds[table.known[i].kind].type ? &table.in(objects[i]) : nullptr;
  }

  bool fits(int64_t turn, const at::TensorBase* t) {
    const int64_t i = table.order[turn];
    void* at;
    if (t == nullptr || !table.kinds[table.known[i].kind].find(t->unsafeGetTensorImpl(), at)) return false;
    addresses[i] = reinterpret_cast<int64_t>(at);
    table.now[i] = t->unsafeGetTensorImpl();
    return true;
  }

  void ask(const at::TensorBase* t) const {
    const auto* impl = reinterpret_cast<const char*>(t->unsafeGetTensorImpl());
    for (size_t at = 0; at < sizeof(c10::TensorImpl); at += 64) __builtin_prefetch(impl + at);
  }

  void ask_behind(const at::TensorBase* t) const {
    const c10::TensorImpl* impl = t->unsafeGetTensorImpl();
    __builtin_prefetch(impl->unsafe_storage().unsafeGetStorageImpl());
    const void* meta = impl->autograd_meta();  // which has the gradient
    if (meta != nullptr) __builtin_prefetch(meta);  // null is in no page table, which is looked for in vain each time
    __builtin_prefetch(*reinterpret_cast<void* const*>(&impl->version_counter()));
  }

  bool operator()(int64_t first, int64_t last) {
    const auto among = [&](int64_t turn) { return turn >= first && turn < last; };
    constexpr int64_t UNDER_WAY = 32;  // a power of 2; an array for all turns would be one more to wait for
    static_assert(UNDER_WAY > 2 * AHEAD);
    const at::TensorBase* tensors[UNDER_WAY];
    const auto of = [&](int64_t turn) -> const at::TensorBase*& { return tensors[turn & (UNDER_WAY - 1)]; };
    for (int64_t turn = first - 3 * AHEAD; turn < last; turn++) {
      const int64_t next = turn + AHEAD, third = next + AHEAD, fourth = third + AHEAD;
      if (fourth < std::min(last, table.alone)) __builtin_prefetch(objects[table.order[fourth]]);
      if (among(third) && (of(third) = tensor(third)) != nullptr) ask(of(third));
      if (among(next) && of(next) != nullptr && of(next)->defined()) ask_behind(of(next));
      if (among(turn) && !fits(turn, of(turn))) return false;
    }
    return true;
  }
};

// Dicts, and what they held.
struct Dicts {
  PyObject* const* dicts;
  const int64_t* sizes;
  int64_t n;
  PyObject* const* items;  // the key and value of each item, dict after dict
  uint64_t* versions;      // of the dicts, kept up to date; null where Python has none

  // Whether they hold the same objects in the same order.
  bool same() const {
    constexpr int64_t AHEAD = 8, VERSION = 3, KEYS = 4, VALUES = 5;  // words of a dict; that of the keys is but a hint
    const auto word = [&](int64_t i, int64_t at) { return reinterpret_cast<const uint64_t*>(dicts[i])[at]; };
    PyObject* const* item = items;
    for (int64_t i = 0; i < n; item += 2 * sizes[i++]) {
      if (i + 2 * AHEAD < n) __builtin_prefetch(dicts[i + 2 * AHEAD]);
      const bool own = versions != nullptr && word(i, VALUES) == 0;  // else an object's, whose attributes are its values
      if (own && word(i, VERSION) == versions[i]) continue;
      if (versions == nullptr && i + AHEAD < n) {
        const char* keys = reinterpret_cast<const char*>(word(i + AHEAD, KEYS));
        for (size_t at = 0; at < 192; at += 64) __builtin_prefetch(keys + at);
      }
      PyObject *key, *value;
      intptr_t place = 0;
      for (int64_t k = 0; k < 2 * sizes[i]; k += 2) {
        if (!PyDict_Next(dicts[i], &place, &key, &value) || key != item[k] || value != item[k + 1]) return false;
      }
      if (PyDict_Next(dicts[i], &place, &key, &value)) return false;
      if (versions != nullptr) versions[i] = word(i, VERSION);
    }
    return true;
  }
};

// Where an object of `size` bytes holds a pointer, or -1.
int64_t place_in(PyObject* object, int64_t size, const void* wanted) {
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

// Takes over the tensors, which are those of the objects. size: bytes of a tensor object. owners[i]: which tensor i is
// the gradient of, or -1. Null: they cannot be checked in this way.
void* inputs_make(at::TensorBase* const* tensors, PyObject* const* objects, const int64_t* owners, int64_t n, int64_t size) {
  auto table = std::make_unique<Table>();
  bool good = n > 0;
  try {
    table->place = good ? place_in(objects[0], size, tensors[0]->unsafeGetTensorImpl()) : -1;
    table->type_place = good ? place_in(objects[0], size, type_of(objects[0])) : -1;
    good = table->place >= 0 && table->type_place >= 0;
    table->now.resize(n);
    for (int64_t i = 0; good && i < n; i++) {
      const at::TensorBase& t = *tensors[i];
      void* at;
      table->known.push_back({table->kind_of(type_of(objects[i]), t), static_cast<int32_t>(owners[i])});
      const Kind& kind = table->kinds[table->known[i].kind];
      table->objects.push_back(objects[i]);
      if (owners[i] < 0) table->order.push_back(i);
      good = table->in(objects[i]).is_same(t) && table->type_of(objects[i]) == kind.type && t.is_contiguous() &&
          kind.find(t.unsafeGetTensorImpl(), at) && at == t.mutable_data_ptr() &&
          (owners[i] < 0 || gradient(tensors[owners[i]]->unsafeGetTensorImpl()).is_same(t));
    }
    table->gradients = table->order.size();
    for (int64_t i = 0; i < n; i++) {
      if (owners[i] >= 0) table->order.push_back(i);
    }
  } catch (...) {
    good = false;
  }
  for (int64_t i = 0; i < n; i++) delete tensors[i];
  return good ? table.release() : nullptr;
}

void inputs_free(void* table) {
  delete static_cast<Table*>(table);
}

// Tells autograd which of the tensors that `inputs_same` found are written.
void inputs_write(void* table_, const uint8_t* written, int64_t threads) {
  const auto& table = *static_cast<Table*>(table_);
  const auto write = [&](int64_t first, int64_t last) {
    for (int64_t turn = first; turn < last; turn++) {
      const int64_t i = table.order[turn];
      if (written[i] && !table.now[i]->is_inference()) table.now[i]->bump_version();
    }
    return true;
  };
  share(0, table.alone, threads, write);
  share(table.alone, table.order.size(), threads, write);
}

// Releases the gradients.
void inputs_done(void* table) {
  static_cast<Table*>(table)->held.clear();
}

// Whether tensors are as those learned: 2 if they are of the objects learned, gradients excepted, else 1; writes their
// addresses. inputs_done has to follow. given: a list of them; null: those of the objects learned, which must exist, and
// their present gradients. dicts: null, or some that have to be the same, too.
int inputs_same(void* table_, PyObject* given, int64_t* addresses, int64_t threads, const Dicts* dicts) {
  auto& table = *static_cast<Table*>(table_);
  if (dicts != nullptr && !dicts->same()) return false;
  try {
    const int64_t n = table.order.size();
    std::vector<PyObject*> listed;
    for (int64_t i = 0; given != nullptr && i < n; i++) listed.push_back(PyList_GetItem(given, i));
    table.alone = given != nullptr ? n : table.gradients;
    Check check{table, given != nullptr ? listed : table.objects, addresses};
    const auto part = [&](int64_t first, int64_t last) { return check(first, last); };
    if (!share(0, table.alone, threads, part) || !share(table.alone, n, threads, part)) return false;
    // On this thread: one more owner of a tensor may be one more owner of its Python object.
    for (int64_t turn = table.alone; turn < n; turn++) table.held.push_back(held(table.now[table.order[turn]]));
    for (int64_t i = 0; given != nullptr && i < n; i++) {
      if (table.known[i].owner < 0 && listed[i] != table.objects[i]) return 1;
    }
    return 2;
  } catch (...) {
    inputs_done(table_);
    return false;
  }
}

}  // extern "C"
