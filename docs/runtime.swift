// A reference runtime for the CoreML shards of `fairway export-coreml`: it reads token ids and writes token ids,
// decoded greedily.
//
// Not compiled and not run by us: no Mac was at hand. tests/coreml/test_runtime_swift.py parses it with a Swift
// grammar, and compares its constants, and the keys that it reads, with the Python code.
//
//     swiftc -O -parse-as-library docs/runtime.swift -o runtime     Swift 5.9 or later, macOS 15, Apple Silicon
//     echo 1 417 23 | ./runtime coreml 64                           64 tokens after these three
//     echo 1 417 23 | ./runtime coreml 64 --no-drafts               the same, one token a call
//
// Input and output are one line of ids, because SentencePiece is not linked; a text begins with BOS, which is 1.
// stderr gets the tokens a second and the share of accepted guesses, or one line about a folder that does not fit.
//
// It follows fairway/coreml/engine.py, host.py and manifest.py, and NGramDrafter in fairway/decoding/drafters.py,
// with these differences:
// - it reads shapes from the manifest's "shards" instead of deriving them from its numbers;
// - drafts have no gate: if a run occurs earlier, it guesses as many tokens as a call has room for; it forgets no run;
// - it does not read close calls again one token at a time: if two tokens are equally likely to within rounding, the
//   text may differ from the text of --no-drafts;
// - it sums squares in Double, not pairwise in fp32.

import CoreML
import CryptoKit
import Foundation

#if !arch(arm64)
#error("Apple Silicon only: Swift has no Float16 on other Macs")
#endif

let bos = 1  // SmearGate does not reach across the start of a document
let epsilon: Float = 0x1p-23
let masked: Float = -1e4
let currentFactor = 36313  // in the hash of two tokens
let previousFactor = 27191
let tableNames = ["embed", "bigram", "smear"]  // their order in host.bin

struct Mismatch: Error {
    let line: String
}

func need(_ holds: Bool, _ line: @autoclosure () -> String) throws {
    if !holds { throw Mismatch(line: line()) }
}

func unwrap<Value>(_ value: Value?, _ line: @autoclosure () -> String) throws -> Value {
    guard let present = value else { throw Mismatch(line: line()) }
    return present
}

// ==== MANIFEST =======================================================================================================
enum Precision: String, Decodable {
    case fp16, fp32

    var dataType: MLMultiArrayDataType { self == .fp16 ? .float16 : .float32 }
    var bytes: Int { self == .fp16 ? 2 : 4 }
}

struct Dims: Decodable {
    let width, kvHeads, head, rotary, vocab, slots: Int
    let parted: [Bool]  // one value for each pass

    enum CodingKeys: String, CodingKey {
        case width, head, rotary, vocab, parted, slots
        case kvHeads = "kv_heads"
    }
}

struct Shard: Decodable {
    let name, package: String
    let inputs, outputs: [String: [[Int]]]  // shapes, one for each of the manifest's sizes
}

struct Table: Decodable {
    let name: String
    let shape: [Int]
}

struct CacheRule: Decodable {
    let slots: Int
    let masked: Float
}

struct Manifest: Decodable {
    let format: String
    let version: Int
    let dims: Dims
    let ropeBase: Double
    let precision: Precision
    let shapes: String
    let states: Int
    let sizes, cuts, split: [Int]
    let tables: [Table]  // in host.bin, in this order
    let functions: [String: [Int]]
    let sha256: [String: String]
    let shards: [Shard]
    let cache: CacheRule

    enum CodingKeys: String, CodingKey {
        case format, version, dims, precision, shapes, states, sizes, cuts, split, tables, sha256, shards, functions
        case cache
        case ropeBase = "rope_base"
    }
}

func readManifest(_ folder: URL) throws -> Manifest {
    let file = folder.appendingPathComponent("manifest.json")
    let data = try unwrap(try? Data(contentsOf: file), "\(file.path) cannot be read; run fairway export-coreml")
    let manifest = try unwrap(try? JSONDecoder().decode(Manifest.self, from: data),
                              "\(file.path) is no manifest of shards, or it is damaged; export it again")
    try need(manifest.format == "fairway-coreml" && manifest.version == 2,
             "\(file.path) is \(manifest.format), version \(manifest.version); this reader knows fairway-coreml, 2")
    try need(manifest.states == 0,
             "\(file.path): states:\(manifest.states); this reader knows shards without any, so export with --states 0")
    try check(manifest)
    return manifest
}

/// Requires that the numbers used below are in range and agree with each other.
func check(_ m: Manifest) throws {
    func hold(_ holds: Bool, _ what: String) throws {
        try need(holds, "manifest.json: \(what) out of range; export it again")
    }
    func rising(_ numbers: [Int], to last: Int) -> Bool {
        numbers.count > 1 && numbers[0] == 0 && numbers[numbers.count - 1] == last && numbers == Set(numbers).sorted()
    }
    let d = m.dims, most = 1 << 20
    try hold([d.width, d.kvHeads, d.head, d.rotary, d.vocab, d.slots].allSatisfy { $0 >= 1 && $0 <= most }, "dims")
    try hold(m.ropeBase >= 1 && m.ropeBase.isFinite, "rope_base")
    try hold(m.sizes.count >= 1 && m.sizes == Set(m.sizes).sorted() && m.sizes[0] >= 1, "sizes")
    try hold(m.functions.values.flatMap { $0 }.sorted() == m.sizes, "functions")
    try hold(rising(m.cuts, to: d.parted.count), "cuts")
    try hold(rising(m.split, to: d.vocab), "split")
    let shape = { (name: String) -> [Int]? in m.tables.first(where: { $0.name == name })?.shape }
    let bigram = shape("bigram") ?? [2, d.width], smear = shape("smear") ?? [d.width]
    try hold(m.tables.map { $0.name } == tableNames.filter { shape($0) != nil }, "tables")
    try hold(shape("embed") == [d.vocab, d.width] && smear == [d.width], "tables")
    try hold(bigram.count == 2 && bigram[0] >= 2 && bigram[0] <= most && bigram[1] == d.width, "tables")
    try hold(m.cache.slots == d.slots && m.cache.masked == masked, "cache")
    let layers: [String] = (1..<m.cuts.count).map { "layers\($0 - 1)" }
    let heads: [String] = (1..<m.split.count).map { "head\($0 - 1)" }
    try hold(m.shards.map { $0.name } == layers + heads, "shards")
    for shard in m.shards {
        let shapes = Array(shard.inputs.values) + Array(shard.outputs.values)
        try hold(shard.package == "\(shard.name).mlpackage", "packages")
        try hold(shapes.allSatisfy { $0.count == m.sizes.count && $0.allSatisfy { $0.count == 4 } }, "shapes of shards")
    }
}

/// Requires the hash of every file, including the listing of a package, which names the model that CoreML loads.
func checkFiles(_ folder: URL, _ manifest: Manifest) throws {
    let root = "Data/com.apple.CoreML"
    let hashed = ["Manifest.json", "\(root)/model.mlmodel", "\(root)/weights/weight.bin"]
    let files = ["host.bin"] + manifest.shards.flatMap { shard in hashed.map { "\(shard.package)/\($0)" } }
    try need(manifest.sha256.keys.sorted() == files.sorted(), "\(folder.path): manifest.json names other files")
    for file in files {
        let bytes = try unwrap(try? Data(contentsOf: folder.appendingPathComponent(file), options: .mappedIfSafe),
                               "\(folder.path): \(file) cannot be read; export it again")
        let now = SHA256.hash(data: bytes).map { String(format: "%02x", $0) }.joined()
        try need(now == manifest.sha256[file], "\(folder.path): \(file) has hash \(now.prefix(12)), not the one in "
                 + "manifest.json: damaged, or from another export; export it again")
    }
}

// ==== ARRAYS =========================================================================================================
// All arrays are [1, a, b, c]. CoreML may pad rows, so elements are addressed by strides only.
extension Precision {
    func load(_ from: UnsafeRawBufferPointer, _ at: Int) -> Float {
        self == .fp16 ? Float(from.loadUnaligned(fromByteOffset: 2 * at, as: Float16.self))
            : from.loadUnaligned(fromByteOffset: 4 * at, as: Float.self)
    }

    func store(_ value: Float, _ to: UnsafeMutableRawBufferPointer, _ at: Int) {
        switch self {
        case .fp16: to.storeBytes(of: Float16(value), toByteOffset: 2 * at, as: Float16.self)
        case .fp32: to.storeBytes(of: value, toByteOffset: 4 * at, as: Float.self)
        }
    }
}

/// Calls `body` with the indices and the offset of each element.
func walk(_ shape: [Int], _ strides: [Int], _ body: (Int, Int, Int, Int) -> Void) {
    for a in 0..<shape[1] {
        for b in 0..<shape[2] {
            for c in 0..<shape[3] { body(a, b, c, a * strides[1] + b * strides[2] + c * strides[3]) }
        }
    }
}

func newArray(_ shape: [Int], _ precision: Precision, _ value: (Int, Int, Int) -> Float) throws -> MLMultiArray {
    let array = try MLMultiArray(shape: shape.map { NSNumber(value: $0) }, dataType: precision.dataType)
    array.withUnsafeMutableBytes { (bytes: UnsafeMutableRawBufferPointer, strides: [Int]) -> Void in
        walk(shape, strides) { a, b, c, at in precision.store(value(a, b, c), bytes, at) }
    }
    return array
}

func shape(of array: MLMultiArray) -> [Int] {
    array.shape.map { $0.intValue }
}

/// Returns the numbers of an array, row by row.
func numbers(of array: MLMultiArray, _ precision: Precision) -> [Float] {
    let lengths = shape(of: array), strides = array.strides.map { $0.intValue }
    var found: [Float] = []
    found.reserveCapacity(lengths.reduce(1, *))
    array.withUnsafeBytes { (bytes: UnsafeRawBufferPointer) -> Void in
        walk(lengths, strides) { _, _, _, at in found.append(precision.load(bytes, at)) }
    }
    return found
}

// ==== EMBEDDING ======================================================================================================
struct Embedding {
    let width: Int
    let embed, bigram, smear: [Float]  // the last two are empty if the model has none

    init(_ folder: URL, _ manifest: Manifest) throws {
        let data = try Data(contentsOf: folder.appendingPathComponent("host.bin")), precision = manifest.precision
        let counts: [Int] = tableNames.map { name in
            (manifest.tables.first(where: { $0.name == name })?.shape ?? [0]).reduce(1, *)
        }
        let total = counts.reduce(0, +), two = counts[0] + counts[1]
        try need(data.count == precision.bytes * total, "host.bin has \(data.count) bytes for \(total) numbers")
        let all = data.withUnsafeBytes { (bytes: UnsafeRawBufferPointer) -> [Float] in
            (0..<total).map { precision.load(bytes, $0) }
        }
        try need(all.allSatisfy { $0.isFinite }, "host.bin holds infinities or NaN; export it again")
        width = manifest.dims.width
        embed = Array(all[0..<counts[0]])
        bigram = Array(all[counts[0]..<two])
        smear = Array(all[two..<total])
    }

    /// Returns a row for each token; `before` holds the last two tokens before them, fewer at the start.
    func rows(_ tokens: [Int], before: [Int]) -> [[Float]] {
        let all = before + tokens
        let x = all.indices.map { at in row(all[at], after: at > 0 ? all[at - 1] : nil) }
        return (before.count..<all.count).map { (at: Int) -> [Float] in
            let here = x[at], last = (at == 0 || all[at] == bos) ? x[at] : x[at - 1]
            return smear.isEmpty ? here : here.indices.map { here[$0] + smear[$0] * (last[$0] - here[$0]) }
        }
    }

    /// Returns embedding plus hashed bigram, normed; the first token of a text takes the last bucket.
    private func row(_ token: Int, after previous: Int?) -> [Float] {
        var x = Array(embed[(token * width)..<((token + 1) * width)])
        if !bigram.isEmpty {
            var bucket = bigram.count / width - 1
            if let before = previous { bucket = ((currentFactor * token) ^ (previousFactor * before)) % bucket }
            for c in 0..<width { x[c] += bigram[bucket * width + c] }
        }
        let squares = x.reduce(Double(0)) { $0 + Double($1) * Double($1) }
        let root = (Float(squares / Double(width)) + epsilon).squareRoot()
        return x.map { $0 / root }
    }
}

// ==== SLOTS ==========================================================================================================
/// Keys and values of one text. Token p is stored in slot p mod slots. Those of the last call stay outside the slots
/// until it is known how many of its tokens are accepted.
final class Slots {
    let names: [String]  // k0, v0, k1, v1 ...
    let kept: [MLMultiArray]  // the arrays of these names
    private(set) var count = 0  // number of tokens stored so far
    private(set) var last: [Int] = []  // the last two tokens, which the next embedding depends on
    private let dims: Dims
    private let precision: Precision
    private var positions: [Int]  // position of the token in each slot, or -1
    private var held: (tokens: [Int], size: Int, arrays: [[Float]]) = ([], 0, [])

    init(_ manifest: Manifest) throws {
        let d = manifest.dims, kind = manifest.precision
        let all: [String] = d.parted.indices.flatMap { ["k\($0)", "v\($0)"] }
        // Zeros, because a mask hides an empty slot but cannot hide NaN.
        kept = try all.map { _ in try newArray([1, d.head, d.kvHeads, d.slots], kind) { _, _, _ in 0 } }
        names = all
        positions = [Int](repeating: -1, count: d.slots)
        dims = d
        precision = kind
    }

    /// Tells whether token `row` of a call of `real` tokens sees `column`: the slots, then the tokens of the call.
    /// A padding token sees itself, because a softmax over nothing is NaN.
    func sees(_ row: Int, _ column: Int, real: Int) -> Bool {
        let at = count + row, own = column - dims.slots
        let key = own < 0 ? positions[column] : count + own
        let there = own < 0 ? (key >= 0) : (own < real)
        return (there || key == at) && key <= at && key > at - dims.slots
    }

    /// Holds the new keys and values of a call padded to `size` tokens.
    func hold(_ tokens: [Int], size: Int, _ arrays: [[Float]]) {
        held = (tokens, size, arrays)
    }

    /// Stores the first `accepted` tokens of the last call, each in its slot.
    func accept(_ accepted: Int) {
        let (groups, slots, from, call) = (dims.kvHeads, dims.slots, count, held)
        for (array, new) in zip(kept, call.arrays) {
            array.withUnsafeMutableBytes { (bytes: UnsafeMutableRawBufferPointer, strides: [Int]) -> Void in
                walk([1, dims.head, groups, accepted], strides) { channel, group, t, at in
                    let row = (channel * groups + group) * call.size, slot = (from + t) % slots
                    precision.store(new[row + t], bytes, at + (slot - t) * strides[3])
                }
            }
        }
        for t in 0..<accepted { positions[(from + t) % slots] = from + t }
        last = Array((last + call.tokens.prefix(accepted)).suffix(2))
        count += accepted
        held = ([], 0, [])
    }
}

// ==== CHAIN ==========================================================================================================
final class Chain {
    let manifest: Manifest
    private let embedding: Embedding
    private var models: [String: [MLModel]] = [:]  // for each function, the models of all shards in order
    private var compiled: [URL] = []

    init(_ folder: URL) async throws {
        manifest = try readManifest(folder)
        try checkFiles(folder, manifest)
        embedding = try Embedding(folder, manifest)
        for shard in manifest.shards {
            let url = try await MLModel.compileModel(at: folder.appendingPathComponent(shard.package))
            compiled.append(url)
            for function in manifest.functions.keys {
                let model = try loaded(url, shard, function)
                models[function, default: []].append(model)
            }
        }
    }

    deinit {
        for url in compiled { try? FileManager.default.removeItem(at: url) }
    }

    private func loaded(_ url: URL, _ shard: Shard, _ function: String) throws -> MLModel {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = .cpuAndNeuralEngine
        if manifest.shapes == "multifunction" { configuration.functionName = function }
        let model = try MLModel(contentsOf: url, configuration: configuration)
        let place = "\(shard.package), function \(function)", sizes = manifest.functions[function] ?? []
        let calls = manifest.sizes.indices.filter { sizes.contains(manifest.sizes[$0]) }
        func compare(_ told: [String: MLFeatureDescription], _ wanted: [String: [[Int]]], gives: Bool) throws {
            let found = told.keys.sorted(), right = wanted.keys.sorted(), verb = gives ? "gives" : "takes"
            try need(found == right, "\(place) \(verb) \(found), wanted are \(right): a shard from another place")
            for (name, shapes) in wanted {
                let here = calls.map { shapes[$0] }
                let array = try unwrap(told[name]?.multiArrayConstraint, "\(place) \(verb) \(name), which is no array")
                try need(array.dataType == manifest.precision.dataType && fits(array, here, gives: gives),
                         "\(place) \(verb) \(name) in other shapes than \(here) or not in \(manifest.precision): a "
                         + "shard from another export")
            }
        }
        try compare(model.modelDescription.inputDescriptionsByName, shard.inputs, gives: false)
        try compare(model.modelDescription.outputDescriptionsByName, shard.outputs, gives: true)
        return model
    }

    /// CoreML gives no shape for an output whose shape depends on the call; `call` checks that output later.
    private func fits(_ told: MLMultiArrayConstraint, _ wanted: [[Int]], gives: Bool) -> Bool {
        let fixed = told.shape.map { $0.intValue }, flexible = told.shapeConstraint
        if gives && fixed.isEmpty { return true }
        switch flexible.type {
        case .enumerated:
            let shapes: [[Int]] = flexible.enumeratedShapes.map { shape in shape.map { $0.intValue } }
            return Set(shapes) == Set(wanted)
        case .range:
            let ranges = flexible.sizeRangeForDimension.map { $0.rangeValue }
            return ranges.count == 4 && ranges.indices.allSatisfy { (axis: Int) -> Bool in
                let sizes = wanted.map { $0[axis] }.sorted(), least = sizes[0], spread = sizes[sizes.count - 1] - least
                // It is not documented whether the length of a range counts both ends, so either is accepted.
                return ranges[axis].location == least && [spread, spread + 1].contains(ranges[axis].length)
            }
        default:
            return Set([fixed]) == Set(wanted)
        }
    }

    /// Returns a row of logits for each token, predicting the token after it; `slots` holds their keys and values.
    func logits(_ tokens: [Int], _ slots: Slots) throws -> [[Float]] {
        try autoreleasepool { try call(tokens, slots) }  // otherwise CoreML's arrays live until the program ends
    }

    private func call(_ tokens: [Int], _ slots: Slots) throws -> [[Float]] {
        let m = manifest, taken = "a call of \(tokens.count) tokens; these shards take \(m.sizes)"
        let nth = try unwrap(m.sizes.firstIndex(where: { $0 >= tokens.count }), taken), size = m.sizes[nth]
        let shards = try unwrap(models.first(where: { m.functions[$0.key]?.contains(size) == true })?.value, taken)
        var have = try given(tokens, size, slots)
        for (shard, model) in zip(m.shards, shards) {
            var inputs: [String: MLFeatureValue] = [:]
            for (name, shapes) in shard.inputs {
                inputs[name] = MLFeatureValue(multiArray: try found(name, in: have, shapes[nth]))
            }
            let made = try model.prediction(from: MLDictionaryFeatureProvider(dictionary: inputs))
            for (name, shapes) in shard.outputs {
                have[name] = made.featureValue(for: name)?.multiArrayValue
                _ = try found(name, in: have, shapes[nth])
            }
        }
        var rows = [[Float]](repeating: [], count: tokens.count)
        for part in 0..<(m.split.count - 1) {
            let length = m.split[part + 1] - m.split[part]
            let array = try found("logits\(part)", in: have, [1, length, 1, size])
            let column = numbers(of: array, m.precision)
            for t in tokens.indices { rows[t] += (0..<length).map { column[$0 * size + t] } }
        }
        let wanted = [1, m.dims.head, m.dims.kvHeads, size]
        let new = try slots.names.map { numbers(of: try found("\($0)_new", in: have, wanted), m.precision) }
        slots.hold(tokens, size: size, new)
        return rows
    }

    /// Returns the inputs that no shard computes; names as in layout.py.
    private func given(_ tokens: [Int], _ size: Int, _ slots: Slots) throws -> [String: MLMultiArray] {
        let d = manifest.dims, kind = manifest.precision, base = manifest.ropeBase, first = slots.count
        let filled = tokens + [Int](repeating: 0, count: size - tokens.count)
        let rows = embedding.rows(filled, before: slots.last)
        func angle(_ pair: Int, _ t: Int) -> Double {
            pow(base, -Double(pair) / Double(d.rotary)) * Double(first + t)
        }
        var have: [String: MLMultiArray] = [:]
        for (name, array) in zip(slots.names, slots.kept) { have[name] = array }
        have["x0"] = try newArray([1, d.width, 1, size], kind) { channel, _, t in rows[t][channel] }
        have["cos"] = try newArray([1, d.rotary, 1, size], kind) { pair, _, t in Float(cos(angle(pair, t))) }
        have["sin"] = try newArray([1, d.rotary, 1, size], kind) { pair, _, t in Float(sin(angle(pair, t))) }
        have["mask"] = try newArray([1, 1, size, d.slots + size], kind) { _, t, column in
            slots.sees(t, column, real: tokens.count) ? 0 : masked
        }
        return have
    }

    private func found(_ name: String, in have: [String: MLMultiArray], _ wanted: [Int]) throws -> MLMultiArray {
        let array = try unwrap(have[name], "no shard computes \(name)"), there = shape(of: array)
        try need(there == wanted && array.dataType == manifest.precision.dataType,
                 "\(name) is \(there); wanted is \(manifest.precision) of \(wanted)")
        return array
    }
}

// ==== DRAFTS =========================================================================================================
/// Guesses the tokens that followed the last occurrence of the longest run that ends the text now.
struct NGram {
    static let runLengths = [12, 8, 6, 4, 3, 2, 1]
    private var text: [Int] = []
    private var after: [[Int]: Int] = [:]  // by run: index in the text of the token after its last occurrence

    /// Takes the whole text so far, which begins with the text of the last call.
    mutating func follow(_ longer: [Int]) {
        for at in text.count..<longer.count {
            for n in NGram.runLengths where n <= at { after[Array(longer[(at - n)..<at])] = at }
        }
        text = longer
    }

    /// Copies the tokens that followed; past the end of the text, the copy continues with itself.
    func propose(_ most: Int) -> [Int] {
        let runs = NGram.runLengths.filter { $0 <= text.count }.map { Array(text.suffix($0)) }
        guard let run = runs.first(where: { after[$0] != nil }), let first = after[run] else { return [] }
        var guesses: [Int] = []
        for at in first..<(first + most) {
            guesses.append(at < text.count ? text[at] : guesses[at - text.count])
        }
        return guesses
    }
}

// ==== DECODING =======================================================================================================
@main
struct Runtime {
    static func main() async {
        do {
            try await run(Array(CommandLine.arguments.dropFirst()))
        } catch {
            let line = (error as? Mismatch)?.line ?? error.localizedDescription
            say("runtime: error: \(line.split(separator: "\n").first ?? "")")
            exit(1)
        }
    }

    static func say(_ line: String) {
        FileHandle.standardError.write(Data("\(line)\n".utf8))
    }

    static func run(_ arguments: [String]) async throws {
        let plain = arguments.filter { $0 != "--no-drafts" }
        guard plain.count == 2, let count = Int(plain[1]), count >= 1 else {
            throw Mismatch(line: "usage: runtime FOLDER TOKENS [--no-drafts] < ids")
        }
        let chain = try await Chain(URL(fileURLWithPath: plain[0], isDirectory: true))
        let prompt = try readIds(below: chain.manifest.dims.vocab)
        try write(count, after: prompt, chain, drafts: plain.count == arguments.count)
    }

    static func readIds(below vocab: Int) throws -> [Int] {
        let words = (readLine() ?? "").split(whereSeparator: { $0.isWhitespace })
        let ids = words.compactMap { Int($0) }.filter { $0 >= 0 && $0 < vocab }
        try need(!ids.isEmpty && ids.count == words.count, "stdin must be one line of token ids from 0 to \(vocab - 1)")
        return ids
    }

    /// A call verifies the guesses after the last token. It accepts the right ones and adds one token: a replacement
    /// of the first wrong guess, or the token after the last guess.
    static func write(_ count: Int, after prompt: [Int], _ chain: Chain, drafts: Bool) throws {
        let slots = try Slots(chain.manifest), most = chain.manifest.sizes[chain.manifest.sizes.count - 1]
        for at in stride(from: 0, to: prompt.count - 1, by: most) {
            let piece = Array(prompt[at..<min(at + most, prompt.count - 1)])
            _ = try chain.logits(piece, slots)
            slots.accept(piece.count)
        }
        var text = prompt, draft = NGram(), calls = 0, drafted = 0, accepted = 0
        let end = prompt.count + count, began = ProcessInfo.processInfo.systemUptime
        while text.count < end {
            var guesses: [Int] = []
            if drafts {
                draft.follow(text)
                guesses = draft.propose(min(most, end - text.count) - 1)
            }
            let rows = try chain.logits([text[text.count - 1]] + guesses, slots)
            var right = 0, token = try best(rows[0])
            text.append(token)
            while right < guesses.count && guesses[right] == token {
                right += 1
                token = try best(rows[right])
                text.append(token)
            }
            slots.accept(1 + right)
            calls += 1
            drafted += guesses.count
            accepted += right
        }
        let seconds = ProcessInfo.processInfo.systemUptime - began, tokens = Double(count)
        print(text.dropFirst(prompt.count).map { String($0) }.joined(separator: " "))
        say(String(format: "tokens:%ld seconds:%.3f tokens_per_second:%.1f acceptance:%.3f tokens_per_call:%.2f", count,
                   seconds, tokens / max(seconds, 1e-9), Double(accepted) / Double(max(drafted, 1)),
                   tokens / Double(calls)))
    }

    /// Returns the most likely token; of equally likely ones, the lowest.
    static func best(_ logits: [Float]) throws -> Int {
        try need(logits.allSatisfy { $0.isFinite }, "the shards return logits that are infinite or NaN")
        var found = 0
        for token in logits.indices where logits[token] > logits[found] { found = token }
        return found
    }
}
